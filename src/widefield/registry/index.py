"""The components of Widefield: names, homes and summaries, so that they can be listed without being imported."""

from widefield.registry.registry import Entry

_HOME = "widefield.components"

# Replaceable are those that the tutorials of MMPretrain have their readers write: the reader's takes the place of ours.
COMPONENTS = (
    Entry("ResNet", f"{_HOME}.backbones.resnet:ResNet", "backbone", "ResNet of depth 18, 34, 50, 101 or 152."),
    Entry(
        "ResNet_CIFAR",
        f"{_HOME}.backbones.resnet_cifar:ResNet_CIFAR",
        "backbone",
        "ResNet for images of 32 x 32 pixels: a 3 x 3 stem of stride 1, and no pooling behind it.",
        replaceable=True,
    ),
    Entry(
        "MobileNetV2",
        f"{_HOME}.backbones.mobilenet_v2:MobileNetV2",
        "backbone",
        "MobileNetV2: seven stages of inverted residuals and a last convolution.",
    ),
    Entry(
        "MobileNetV3",
        f"{_HOME}.backbones.mobilenet_v3:MobileNetV3",
        "backbone",
        "MobileNetV3: inverted residuals with squeeze-and-excitation and hard swish.",
    ),
    Entry(
        "EfficientNet",
        f"{_HOME}.backbones.efficientnet:EfficientNet",
        "backbone",
        "EfficientNet b0 to b7: a stem, five stages, and a last convolution.",
    ),
    Entry(
        "ConvNeXt",
        f"{_HOME}.backbones.convnext:ConvNeXt",
        "backbone",
        "ConvNeXt and ConvNeXt V2: four stages of depthwise 7 x 7 convolutions and perceptrons over channels.",
    ),
    Entry("TimmBackbone", f"{_HOME}.backbones.timm_backbone:TimmBackbone", "backbone", "Any network of timm, by name."),
    Entry(
        "VisionTransformer",
        f"{_HOME}.backbones.vision_transformer:VisionTransformer",
        "backbone",
        "Vision transformer: patches as tokens, pre-norm attention over all of them.",
    ),
    Entry(
        "MAEViT",
        f"{_HOME}.backbones.mae_vit:MAEViT",
        "backbone",
        "Vision transformer that sees a random part of the patches, the encoder of MAE.",
        replaceable=True,
    ),
    Entry(
        "BEiTViT",
        f"{_HOME}.backbones.beit_vit:BEiTViT",
        "backbone",
        "Vision transformer with biases of relative positions, as BEiT has it for fine-tuning.",
    ),
    Entry(
        "BEiTPretrainViT",
        f"{_HOME}.backbones.beit_vit:BEiTPretrainViT",
        "backbone",
        "Vision transformer of BEiT, v1 and v2, in which a learned token replaces masked patches.",
    ),
    Entry(
        "MaskFeatViT",
        f"{_HOME}.backbones.maskfeat_vit:MaskFeatViT",
        "backbone",
        "Vision transformer in which a learned token replaces masked patches, as MaskFeat has it.",
    ),
    Entry(
        "GlobalAveragePooling",
        f"{_HOME}.necks.gap:GlobalAveragePooling",
        "neck",
        "The average of each channel over all positions.",
        replaceable=True,
    ),
    Entry(
        "LinearNeck",
        f"{_HOME}.necks.linear_neck:LinearNeck",
        "neck",
        "A linear layer, a norm and an activation, of the features of the last stage.",
    ),
    Entry(
        "NonLinearNeck",
        f"{_HOME}.necks.nonlinear_neck:NonLinearNeck",
        "neck",
        "The projection of contrastive learning: linear layers with norms, and ReLU between them, fc-bn-[relu-fc-bn]*.",
    ),
    Entry(
        "MAEPretrainDecoder",
        f"{_HOME}.necks.mae_neck:MAEPretrainDecoder",
        "neck",
        "Decoder of masked autoencoders: predicts the pixels of every patch from the tokens of those that were seen.",
    ),
    Entry(
        "BEiTV2Neck",
        f"{_HOME}.necks.beitv2_neck:BEiTV2Neck",
        "neck",
        "A second way to predict masked patches: from the final class token and the patches of an early layer alone.",
    ),
    Entry(
        "ClsHead",
        f"{_HOME}.heads.cls_head:ClsHead",
        "head",
        "Classification head without parameters: its input are scores.",
    ),
    Entry("LinearClsHead", f"{_HOME}.heads.linear_head:LinearClsHead", "head", "Classification by one linear layer."),
    Entry(
        "VisionTransformerClsHead",
        f"{_HOME}.heads.vision_transformer_head:VisionTransformerClsHead",
        "head",
        "Classification of the class token by one linear layer, or by two with an activation between them.",
        replaceable=True,
    ),
    Entry(
        "MultiLabelClsHead",
        f"{_HOME}.heads.multi_label_cls_head:MultiLabelClsHead",
        "head",
        "Multi-label classification head without parameters: its input are scores.",
    ),
    Entry(
        "MultiLabelLinearClsHead",
        f"{_HOME}.heads.multi_label_linear_head:MultiLabelLinearClsHead",
        "head",
        "Multi-label classification by one linear layer.",
    ),
    Entry(
        "ContrastiveHead",
        f"{_HOME}.heads.contrastive_head:ContrastiveHead",
        "head",
        "Classification of the positive pair among the negative ones, InfoNCE.",
    ),
    Entry(
        "LatentPredictHead",
        f"{_HOME}.heads.latent_heads:LatentPredictHead",
        "head",
        "Compares what a predictor makes of one view with the other view, which gets no gradient.",
    ),
    Entry(
        "MAEPretrainHead",
        f"{_HOME}.heads.mae_head:MAEPretrainHead",
        "head",
        "Compares predicted patches with those of the image, for masked autoencoders.",
        replaceable=True,
    ),
    Entry("MIMHead", f"{_HOME}.heads.mim_head:MIMHead", "head", "Compares predictions with targets under a mask."),
    Entry(
        "BEiTV1Head",
        f"{_HOME}.heads.beitv1_head:BEiTV1Head",
        "head",
        "Predicts which of the DALL-E encoder's tokens masked patches have.",
    ),
    Entry(
        "BEiTV2Head",
        f"{_HOME}.heads.beitv2_head:BEiTV2Head",
        "head",
        "Predicts VQ-KD's tokens of masked patches twice, by one layer.",
    ),
    Entry(
        "CrossEntropyLoss",
        f"{_HOME}.losses.cross_entropy_loss:CrossEntropyLoss",
        "loss",
        "Cross-entropy of class indices, of soft labels, or of independent labels.",
    ),
    Entry(
        "LabelSmoothLoss",
        f"{_HOME}.losses.label_smooth_loss:LabelSmoothLoss",
        "loss",
        "Cross-entropy of smoothed labels.",
    ),
    Entry(
        "L1Loss",
        f"{_HOME}.losses.l1_loss:L1Loss",
        "loss",
        "Absolute difference of predictions and targets.",
        replaceable=True,
    ),
    Entry(
        "PixelReconstructionLoss",
        f"{_HOME}.losses.pixel_reconstruction_loss:PixelReconstructionLoss",
        "loss",
        "Difference of predicted and true values of masked patches.",
    ),
    Entry(
        "CosineSimilarityLoss",
        f"{_HOME}.losses.cosine_similarity_loss:CosineSimilarityLoss",
        "loss",
        "shift - scale * cosine of the angle between prediction and target.",
    ),
    Entry(
        "FocalLoss",
        f"{_HOME}.losses.focal_loss:FocalLoss",
        "loss",
        "Binary cross-entropy of each class, in which what is right already counts little.",
    ),
    Entry(
        "AsymmetricLoss",
        f"{_HOME}.losses.asymmetric_loss:AsymmetricLoss",
        "loss",
        "Focal loss with one exponent for positive labels and another for negative ones.",
    ),
    Entry(
        "HOGGenerator",
        f"{_HOME}.target_generators.hog_generator:HOGGenerator",
        "target_generator",
        "Histograms of oriented gradients of every patch, the targets of MaskFeat.",
    ),
    Entry(
        "VQKD",
        f"{_HOME}.target_generators.vqkd:VQKD",
        "target_generator",
        "Visual tokens by vector-quantised knowledge distillation, the targets of BEiT v2.",
    ),
    Entry(
        "DALLEEncoder",
        f"{_HOME}.target_generators.dalle_encoder:DALLEEncoder",
        "target_generator",
        "Scores of the visual tokens of DALL-E's discrete autoencoder, the targets of BEiT.",
    ),
    Entry(
        "ImageClassifier",
        f"{_HOME}.models.image_classifier:ImageClassifier",
        "model",
        "Classification of images: a backbone, a neck, and a head that knows the loss.",
    ),
    Entry(
        "MAE",
        f"{_HOME}.models.mae:MAE",
        "model",
        "Masked autoencoder: the pixels of patches that the backbone did not see are predicted from those that it saw.",
    ),
    Entry(
        "BEiT", f"{_HOME}.models.beit:BEiT", "model", "BEiT, v1 and v2: visual tokens of masked patches are predicted."
    ),
    Entry(
        "MaskFeat",
        f"{_HOME}.models.maskfeat:MaskFeat",
        "model",
        "MaskFeat: features of masked patches, such as histograms of oriented gradients, are predicted.",
    ),
    Entry(
        "SimCLR",
        f"{_HOME}.models.simclr:SimCLR",
        "model",
        "SimCLR: two views of an image are nearer to each other than to those of all other images in the batch.",
    ),
    Entry(
        "MoCo",
        f"{_HOME}.models.moco:MoCo",
        "model",
        "MoCo, v1 and v2: a view of an image is nearer to another view of it than to those in a queue of earlier images.",
    ),
    Entry(
        "ImageToImageRetriever",
        f"{_HOME}.models.image_to_image_retriever:ImageToImageRetriever",
        "model",
        "Ranks the images of a collection, the prototype, by their similarity with an image.",
    ),
    Entry(
        "ClsDataPreprocessor",
        f"{_HOME}.preprocessors.cls_preprocessor:ClsDataPreprocessor",
        "preprocessor",
        "Normalises and stacks images, and makes scores of labels where images are mixed.",
    ),
    Entry(
        "SelfSupDataPreprocessor",
        f"{_HOME}.preprocessors.self_sup_preprocessor:SelfSupDataPreprocessor",
        "preprocessor",
        "Normalises and stacks images, or each of several views of them.",
    ),
    Entry(
        "TwoNormDataPreprocessor",
        f"{_HOME}.preprocessors.two_norm_preprocessor:TwoNormDataPreprocessor",
        "preprocessor",
        "Two views of each image, normalised in two ways: that of the model and that of the target generator.",
    ),
)

METRIC_ENTRIES = (
    Entry(
        "Accuracy",
        f"{_HOME}.metrics.accuracy:Accuracy",
        summary="Percent of images whose class is among the k of highest score, `accuracy/topk`.",
    ),
    Entry(
        "SingleLabelMetric",
        f"{_HOME}.metrics.single_label:SingleLabelMetric",
        summary="Precision, recall and F1 in percent, and support, of one class per image: `single-label/precision` etc.",
    ),
    Entry(
        "ConfusionMatrix",
        f"{_HOME}.metrics.confusion_matrix:ConfusionMatrix",
        summary="How many images of each class are predicted as each class, `confusion_matrix/result`.",
    ),
    Entry(
        "MultiLabelMetric",
        f"{_HOME}.metrics.multi_label:MultiLabelMetric",
        summary="Precision, recall and F1 in percent, and support, of several classes per image: `multi-label/precision` etc.",
    ),
    Entry(
        "AveragePrecision",
        f"{_HOME}.metrics.average_precision:AveragePrecision",
        summary="Average precision of each class in percent, `multi-label/AP_classwise`, or their mean, `multi-label/mAP`.",
    ),
    Entry(
        "RetrievalRecall",
        f"{_HOME}.metrics.retrieval_recall:RetrievalRecall",
        summary="Percent of queries with a relevant item among the first k, `retrieval/Recall@k`.",
    ),
    Entry(
        "RetrievalAveragePrecision",
        f"{_HOME}.metrics.retrieval_average_precision:RetrievalAveragePrecision",
        summary="Mean over queries of the average precision of the first k items in percent, `retrieval/mAP@k`.",
    ),
)
