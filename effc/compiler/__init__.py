"""What happens in which order: recipe, source model, pipeline, artifact, verification, benchmark, report."""
