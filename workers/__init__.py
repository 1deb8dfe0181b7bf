"""The workers' side: claim a job, run its layers on executors, store the result."""
