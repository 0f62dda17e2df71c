"""Stage one: images and masks through the frozen models into the cache. The only home of ONNX Runtime."""
