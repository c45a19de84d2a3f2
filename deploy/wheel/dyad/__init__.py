"""Dyad: distributed preference fine-tuning of language models. The commands are `dyad`, `dyad-coordinator` and `dyad-trainer`."""
