"""A small test world for K-LoRA: emoji, the same things drawn by several design houses, a diffusion
model that learnt some of them, and LoRAs of things and sets that it never saw. Small enough for a
CPU.

::

    emoji       npm packages → what each set draws of each thing
    world       which things and sets are held out; how a picture is shown to the model
    model       prompt → picture: a UNet with cross-attention
    generate    prompt with tags → pictures, through lib_klora's session and its diffusers host
    train       makes weights/ (model, LoRAs, judges) from the world, from a seed
    judges      what a picture shows, in the features of a network of other people
    demo        one picture and a page
    ways        the methods that are compared; scores, evaluate: their tables
    real_files  what the schedules do on LoRA files of other people
"""
