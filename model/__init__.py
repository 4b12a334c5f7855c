"""A minimal Llama: its configuration, its weights, its rotary tables and its layers."""
