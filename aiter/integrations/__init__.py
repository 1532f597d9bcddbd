"""The clients: one small file for each program that calls attention. None imports its client before it is used."""
