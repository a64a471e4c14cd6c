"""Exports to other programs and imports from them: one file a format, all in `exports.table`."""
