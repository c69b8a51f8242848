"""Names that notebooks, YAML files and downstream projects import, where the 2021 code had them."""

import importlib
import inspect

import pytest

PATHS = {
    "main": (
        "DataModuleFromConfig ImageLogger SetupCallback WrappedDataset get_obj_from_str "
        "instantiate_from_config"
    ),
    "taming.lr_scheduler": (
        "LambdaLinearScheduler LambdaWarmUpCosineScheduler LambdaWarmUpCosineScheduler2"
    ),
    "taming.util": "KeyNotFoundError download get_ckpt_path md5_hash retrieve",
    "taming.models.cond_transformer": "Net2NetTransformer",
    "taming.models.dummy_cond_stage": "DummyCondStage",
    "taming.models.vqgan": "EMAVQ GumbelVQ VQModel VQNoDiscModel VQSegmentationModel",
    "taming.modules.diffusionmodules.model": (
        "AttnBlock Decoder Downsample Encoder Normalize ResnetBlock Upsample nonlinearity"
    ),
    "taming.modules.discriminator.model": "NLayerDiscriminator weights_init",
    "taming.modules.losses": "DummyLoss",
    "taming.modules.losses.lpips": "LPIPS",
    "taming.modules.losses.segmentation": "BCELoss BCELossWithQuant",
    "taming.modules.losses.vqperceptual": (
        "DummyLoss LPIPS NLayerDiscriminator VQLPIPSWithDiscriminator adopt_weight hinge_d_loss "
        "vanilla_d_loss weights_init"
    ),
    "taming.modules.misc.coord": "CoordStage",
    "taming.modules.transformer.mingpt": "CodeGPT GPT GPTConfig KMeans sample sample_with_past top_k_logits",
    "taming.modules.transformer.permuter": (
        "AbstractPermuter AlternateParsing Identity Random SpiralIn SpiralOut Subsample ZCurve mortonify"
    ),
    "taming.modules.util": "ActNorm Labelator SOSProvider",
    "taming.modules.vqvae.quantize": (
        "EMAVectorQuantizer EmbeddingEMA GumbelQuantize VectorQuantizer VectorQuantizer2"
    ),
    "taming.data.ade20k": "Examples",
    "taming.data.annotated_objects_coco": "AnnotatedObjectsCoco",
    "taming.data.annotated_objects_open_images": "AnnotatedObjectsOpenImages",
    "taming.data.base": "ImagePaths NumpyPaths",
    "taming.data.coco": "CocoImagesAndCaptionsTrain CocoImagesAndCaptionsValidation Examples",
    "taming.data.conditional_builder.objects_bbox": "ObjectsBoundingBoxConditionalBuilder",
    "taming.data.conditional_builder.objects_center_points": "ObjectsCenterPointsConditionalBuilder",
    "taming.data.custom": "CustomTest CustomTrain",
    "taming.data.faceshq": (
        "CelebAHQTrain CelebAHQValidation FFHQTrain FFHQValidation FacesHQTrain FacesHQValidation"
    ),
    "taming.data.imagenet": (
        "DRINExamples ImageNetEdgesTrain ImageNetEdgesValidation ImageNetScaleTrain ImageNetScaleValidation "
        "ImageNetTrain ImageNetTrainWithDepth ImageNetValidation ImageNetValidationWithDepth RINTrain "
        "RINTrainWithDepth RINValidation RINValidationWithDepth"
    ),
    "taming.data.sflckr": "Examples SegmentationBase",
}


@pytest.mark.parametrize("module", PATHS)
def test_every_name_is_there(module):
    found = importlib.import_module(module)
    missing = [name for name in PATHS[module].split() if not callable(getattr(found, name, None))]
    assert not missing, f"{module} lacks {missing}"


def test_what_latent_diffusion_imports_with_a_star():
    names: dict = {}
    exec("from taming.modules.losses.vqperceptual import *", names)
    wanted = {"hinge_d_loss", "vanilla_d_loss", "adopt_weight", "NLayerDiscriminator", "weights_init"}
    assert wanted <= set(names)
    assert "Tensor" not in names  # only what belongs to the module


POSITIONAL = {  # arguments that old code gives without their names
    "taming.modules.vqvae.quantize.VectorQuantizer": "n_e e_dim beta",
    "taming.modules.vqvae.quantize.VectorQuantizer2": (
        "n_e e_dim beta remap unknown_index sane_index_shape legacy"
    ),
    "taming.modules.vqvae.quantize.GumbelQuantize": (
        "num_hiddens embedding_dim n_embed straight_through kl_weight temp_init use_vqinterface remap "
        "unknown_index"
    ),
    "taming.modules.vqvae.quantize.EMAVectorQuantizer": (
        "n_embed embedding_dim beta decay eps remap unknown_index"
    ),
    "taming.models.vqgan.VQModel": (
        "ddconfig lossconfig n_embed embed_dim ckpt_path ignore_keys image_key colorize_nlabels monitor "
        "remap sane_index_shape"
    ),
    "taming.models.vqgan.EMAVQ": (
        "ddconfig lossconfig n_embed embed_dim ckpt_path ignore_keys image_key colorize_nlabels monitor "
        "remap sane_index_shape"
    ),
    "taming.models.vqgan.GumbelVQ": (
        "ddconfig lossconfig n_embed embed_dim temperature_scheduler_config ckpt_path ignore_keys image_key "
        "colorize_nlabels monitor kl_weight remap"
    ),
    "taming.models.cond_transformer.Net2NetTransformer": (
        "transformer_config first_stage_config cond_stage_config permuter_config ckpt_path ignore_keys "
        "first_stage_key cond_stage_key downsample_cond_size pkeep sos_token unconditional"
    ),
    "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator": (
        "disc_start codebook_weight pixelloss_weight disc_num_layers disc_in_channels disc_factor "
        "disc_weight perceptual_weight use_actnorm disc_conditional disc_ndf disc_loss"
    ),
    "taming.modules.transformer.mingpt.GPT": (
        "vocab_size block_size n_layer n_head n_embd embd_pdrop resid_pdrop attn_pdrop n_unmasked"
    ),
    "taming.modules.transformer.mingpt.sample": "model x steps temperature sample top_k",
    "taming.modules.transformer.mingpt.sample_with_past": (
        "x model steps temperature sample_logits top_k top_p callback"
    ),
    "taming.modules.misc.coord.CoordStage": "n_embed down_factor",
    "taming.modules.util.Labelator": "n_classes quantize_interface",
    "taming.modules.util.SOSProvider": "sos_token quantize_interface",
}


@pytest.mark.parametrize("path", POSITIONAL)
def test_arguments_keep_their_order(path):
    module, name = path.rsplit(".", 1)
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters.values()
    in_order = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    want = POSITIONAL[path].split()
    assert in_order[: len(want)] == want
