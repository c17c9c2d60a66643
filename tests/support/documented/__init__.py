"""What the pages promise, held against what there is: links, commands' flags, public names, and the site of them.

``make docs`` runs it, and so does ``tests/test_docs.py``.  Each check returns faults, a line each, and takes the folder
that it looks into: a broken copy too.
"""
