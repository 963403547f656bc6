"""A small test world for K-LoRA: subjects and styles that we draw, a diffusion model that learnt
them, and LoRAs of subjects and styles that it never saw. Small enough for a CPU.

::

    world     subjects × styles × contexts → pictures and their prompts
    model     prompt → picture: a UNet with cross-attention
    generate  prompt with tags → pictures, through lib_klora's session and its diffusers host
    train     makes weights/ (model, LoRAs, judges) from the world, from a seed
    judges    what a picture shows: trained judges, and measures without training
    demo      one picture and a page
    ways      the methods that are compared; scores, evaluate: their tables
"""
