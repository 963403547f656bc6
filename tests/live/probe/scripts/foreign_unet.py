"""An SD Unet called “klora-probe”: a model of an extension's own, as TensorRT's are."""

from klora_live_host import record

if record.can("foreign UNets"):
    from modules import script_callbacks, sd_unet

    class ForeignUnet(sd_unet.SdUnet):
        """Calls no layer of the checkpoint."""

        def forward(self, x, *args, **kwargs):
            """Something that depends on nothing else."""
            return x / 2

    class ForeignUnetOption(sd_unet.SdUnetOption):
        """What the host lists."""

        label = "klora-probe"

        def create_unet(self):
            """A new one whenever it is chosen."""
            return ForeignUnet()

    script_callbacks.on_list_unets(lambda known: known.append(ForeignUnetOption()))
