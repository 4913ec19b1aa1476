"""Measure a converted model beside the dense one: time, memory, and how far it is from the floor.

Everything is measured in turn in one process, so that other load slows both models alike; the ratio
is what counts. A time is the median of the rounds, with its quartiles.
"""
