"""A live page of runs: `verism-watch runs/world runs/naive`, or `verism-train world --watch`.

It reads run folders and nothing else, so it also shows runs of other people, of other machines on a shared disk, and finished ones.
files.py reads what nobody should trust, tail.py what still grows; table.py keeps curves small, record.py is one run, server.py the page.
"""
