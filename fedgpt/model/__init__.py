"""The GPT, its generation and its Hugging Face form."""
