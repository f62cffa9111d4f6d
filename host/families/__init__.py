"""What a model family offers to techniques, one file for each kind of attention.

Classes of the host's are known by their full names, so that a host which lacks or moves one costs that family only.
"""
