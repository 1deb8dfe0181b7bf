"""HTTP in, jobs out: the REST API and the dashboard. No torch, no Ray."""
