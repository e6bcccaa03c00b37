"""What people come for, each expressed as an inner and an outer problem and nothing else."""
