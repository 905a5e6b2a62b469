"""Test-time scaling for one chat request: self-consistency, refinement, DeepConf (registry.py lists them)."""
