"""Vehicle masks: detection, selection and cutouts."""
