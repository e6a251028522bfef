"""The evidence: which experiments there are, running them, collecting what they found, and the statistics of it."""
