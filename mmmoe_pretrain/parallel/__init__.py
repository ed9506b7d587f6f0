"""Process groups, collectives, and the start of a job."""
