"""The commands of the command line.

They are thin, and import what needs torch inside the function, so that ``--help`` answers at once.
"""
