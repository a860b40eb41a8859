"""A run watched from outside its steps: whose folder it is, who asked it to stop, which rank is lost."""
