"""Rewards that are refitted while they serve: on real pictures and on what a generator makes now."""
