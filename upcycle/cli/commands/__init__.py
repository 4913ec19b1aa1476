"""The commands of the command line, one per file.

They are thin, and import what needs torch inside the function, so that ``--help`` answers at once.
"""
