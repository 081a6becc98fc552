"""Co-design search for LLM inference: build each configuration, measure it, choose with evidence."""

__version__ = "0.1.0"
