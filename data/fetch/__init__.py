"""Get a data set that others offer: its JSON, and only the pictures that are named in it.

`sources` lists the data sets, `client` asks for one file over HTTP, `parts` keeps a file as far as
it has come, and `pictures` gets many pictures at once.
"""
