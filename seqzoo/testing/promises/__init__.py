"""The promises of a mixer, one function each; seqzoo/testing/mixer_suite.py runs them."""
