"""Latents and prompt embeddings on disk, so that training needs neither the VAE nor the text encoder.

    cache.json                what the cache was made from, and its clips; written last
    latents/<id>.safetensors  "latents" of one clip, without batch axis; id from the clip's name. With image-to-video
                              teachers also the conditioning of its first frame, under its own names
    prompts/<id>.safetensors  the conditioning of one caption, without batch axis; id from its text

Every tensor file carries what it was made from and a checksum, so that a damaged or exchanged one is never trained on.
"""
