"""What is shown of a run: terminal, TensorBoard, pictures."""
