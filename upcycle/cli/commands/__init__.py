"""The commands of the command line, one per file.

They are thin: they read a recipe, call `upcycle.conversion.named_models` and print a report. They
import what needs torch themselves, so that ``--help`` answers at once.
"""
