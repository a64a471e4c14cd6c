"""HTML files that need no other, made of the templates beside this file.

Every text that goes in is escaped by the template engine, and each page itself (page.html) forbids
scripts and anything from outside.
"""

from __future__ import annotations

from pathlib import Path


def rendered(template: str, **values: object) -> str:
    """The page that a template makes of these values; every name that it uses has to be given."""
    import jinja2  # here: who makes no page need not wait for it

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
