"""The MobileNetV2 of npm's nsfwjs, as safetensors."""
