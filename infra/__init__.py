"""Database and job store, object storage, embedded servers, settings and log setup. Imports no torch and no Ray."""
