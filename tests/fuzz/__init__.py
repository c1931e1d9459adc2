"""Fuzzing targets: C++ under libFuzzer, Python under atheris or Hypothesis; see docs/testing.md."""
