"""What is built: the place of the Amaranth components. It holds none yet (see docs/roadmap.md)."""
