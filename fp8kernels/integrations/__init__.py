"""Other people's trainers and loggers: what saves typing there. Nothing here is needed to train."""
