"""Tests of cmoe.learners."""
