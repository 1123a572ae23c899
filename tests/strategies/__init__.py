"""Tests of cmoe.strategies."""
