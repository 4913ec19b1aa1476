"""Measure a converted model beside the dense one: time, memory, and how far it is from the floor.

Everything is measured in one process, in turn, so that a machine that is busy is busy for all; what
counts is the ratio. A time is the median of the rounds, beside the quartiles.
"""
