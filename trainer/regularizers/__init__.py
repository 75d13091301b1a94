"""Keeping the policy near where it started."""
