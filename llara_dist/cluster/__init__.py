"""Jobs of a Slurm cluster: writing, submitting and following them, and what runs inside one."""
