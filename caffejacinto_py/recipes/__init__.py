"""Recipes: stages of training and testing, one after the other, from a yaml file."""

from __future__ import annotations
