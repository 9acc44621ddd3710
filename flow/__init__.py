"""Is it right, and which design is best? Sweeps, records, Pareto fronts, reports and the command line."""
