"""Tests of cmoe.backbones."""
