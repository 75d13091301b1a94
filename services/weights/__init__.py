"""Weights that the services ship as data, each folder with its licence, card and recipe."""
