"""Pictures show what was predicted, where it was predicted, in the same colours everywhere."""

import numpy as np
import torch

from detbb.report.plots import class_colour, draw_predictions, pr_curves, samples_grid
from detbb.structures.predictions import Predictions

GRAY = np.full((500, 600, 3), 128, np.uint8)
CLASSES = ("cell", "platelet", "細胞")


def objects(*boxes: list[float], scores: list[float] | None = None, **more: torch.Tensor) -> Predictions:
    count = len(boxes)
    given = None if scores is None else torch.tensor(scores)
    return Predictions(torch.tensor(boxes), given, torch.arange(count), **more)


def has_colour(picture: np.ndarray, label: int) -> np.ndarray:
    return (picture == np.array(class_colour(label))).all(-1)


def test_classes_have_distinct_and_stable_colours() -> None:
    colours = [class_colour(label) for label in range(80)]
    assert len(set(colours)) == 80 and colours == [class_colour(label) for label in range(80)]


def test_boxes_are_in_place_and_only_above_the_threshold() -> None:
    predictions = objects([100, 200, 300, 400], [400, 50, 500, 90], scores=[0.9, 0.3])
    picture = draw_predictions(GRAY, predictions, CLASSES, threshold=0.5)
    assert picture.shape == GRAY.shape and picture.dtype == np.uint8
    rows, columns = np.nonzero(has_colour(picture, 0)[200:])
    assert (rows.min(), rows.max() + 200, columns.min(), columns.max()) == (0, 400, 100, 300)
    assert not has_colour(picture, 1).any()
    assert has_colour(draw_predictions(GRAY, predictions, CLASSES, threshold=0.3), 1).any()


def test_a_picture_without_an_object_says_what_came_closest() -> None:
    below = draw_predictions(GRAY, objects([100, 200, 300, 400], scores=[0.4998]), CLASSES, threshold=0.5)
    assert (below[:40] != GRAY[:40]).any() and (below[40:] == GRAY[40:]).all()


def test_ground_truth_needs_no_scores() -> None:
    assert has_colour(draw_predictions(GRAY, objects([100, 200, 300, 400]), CLASSES), 0).any()


def test_small_images_are_enlarged_and_any_fills_the_fit() -> None:
    predictions = objects([10, 10, 50, 30], scores=[0.9])
    small = draw_predictions(GRAY[:50, :60], predictions, CLASSES)
    assert small.shape == (200, 240, 3)
    columns = np.nonzero(has_colour(small, 0)[60:])[1]
    assert (columns.min(), columns.max()) == (40, 200)
    assert draw_predictions(GRAY, predictions, CLASSES, fit=(250, 900)).shape == (250, 300, 3)
    assert draw_predictions(GRAY[:50, :60], predictions, CLASSES, fit=(250, 900)).shape == (250, 300, 3)


def test_masks_colour_their_pixels_in_both_forms() -> None:
    half = torch.zeros(1, 28, 28)
    half[:, :, 14:] = 1
    whole = torch.zeros(1, 500, 600, dtype=torch.bool)
    whole[:, 100:300, 200:300] = True
    for masks in (half, whole):
        picture = draw_predictions(GRAY, objects([100, 100, 300, 300], scores=[0.9], masks=masks), CLASSES)
        tinted = 0.55 * 128 + 0.45 * np.array(class_colour(0))
        assert np.abs(picture[200, 250] - tinted).max() <= 1
        assert (picture[200, 150] == 128).all() and (picture[350, 250] == 128).all()


def test_a_picture_without_keypoint_objects_is_drawn() -> None:
    given = objects([100, 200, 300, 400], scores=[0.1], keypoints=torch.zeros(1, 3, 3))
    assert draw_predictions(GRAY, given, CLASSES, threshold=0.5).shape == GRAY.shape


def test_keypoints_that_are_absent_are_not_drawn() -> None:
    points = torch.tensor([[[150.0, 250, 1], [250, 350, 0]]])
    picture = draw_predictions(GRAY, objects([100, 200, 300, 400], scores=[0.9], keypoints=points), CLASSES)
    assert (picture[250, 150] == np.array(class_colour(0))).all() and (picture[350, 250] == 128).all()


def test_crowded_labels_never_hide_each_other() -> None:
    one = draw_predictions(GRAY, objects([100, 200, 300, 400], scores=[0.9]), CLASSES, threshold=0)
    many = [[100.0, 200, 300, 400]] * 9
    same = Predictions(torch.tensor(many), torch.linspace(0.9, 0.1, 9), torch.zeros(9, dtype=torch.long))
    picture = draw_predictions(GRAY, same, CLASSES, threshold=0)
    assert (picture[170:200] == one[170:200]).all()  # the best object's label is as if it were alone


def test_semantic_overlay_has_a_legend_of_the_classes_it_shows() -> None:
    labels = torch.full((500, 600), 255, dtype=torch.uint8)
    labels[:, 300:] = 1
    picture = draw_predictions(GRAY, Predictions(semantic=labels), CLASSES)
    assert picture.shape[0] > 500
    assert (picture[250, 100] == 128).all()  # 255 stays as it is
    assert np.abs(picture[250, 400] - (0.45 * 128 + 0.55 * np.array(class_colour(1)))).max() <= 1
    legend = picture[500:]
    assert has_colour(legend, 1).any() and not has_colour(legend, 0).any()


def test_image_labels_show_the_best_class_below_the_threshold() -> None:
    predictions = Predictions(probabilities=torch.tensor([0.2, 0.4, 0.3]))
    picture = draw_predictions(GRAY, predictions, CLASSES, threshold=0.5)
    assert has_colour(picture, 1).any() and not has_colour(picture, 2).any()
    both = draw_predictions(GRAY, predictions, CLASSES, threshold=0.3)
    assert has_colour(both, 1).any() and has_colour(both, 2).any()


def test_nothing_predicted_gives_the_image_itself() -> None:
    none = Predictions(
        torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long), masks=torch.zeros(0, 28, 28)
    )
    assert (draw_predictions(GRAY, none, CLASSES) == GRAY).all()


def test_grid_puts_ground_truth_left_of_its_prediction() -> None:
    left, right = np.full((40, 300, 3), 10, np.uint8), np.full((40, 300, 3), 250, np.uint8)
    right[..., 0] = 0
    grid = samples_grid([(f"{i}.jpg", left, right) for i in range(5)], "objects")
    where_left, where_right = (grid[44:] == 10).all(-1), (grid[44:] == right[0, 0]).all(-1)
    assert where_left.sum() >= 5 * 12000 and where_right.sum() >= 5 * 12000
    assert np.nonzero(where_left)[1].min() < np.nonzero(where_right)[1].min()
    assert np.count_nonzero(np.diff(where_left.sum(1) > 0, prepend=False)) == 4  # two rows begin and end


def test_curves_have_a_panel_for_each_kind() -> None:
    recall = np.linspace(0, 1, 101)
    curves = {"recall": recall, "precision": {"bbox/all classes, IoU 0.50": 1 - recall, "bbox/cell": 1 - recall**2}}
    one = pr_curves(curves, "objects")
    curves["precision"]["segm/cell"] = 1 - recall
    assert pr_curves(curves, "objects").shape[1] > 1.8 * one.shape[1] and one.std() > 10


def test_curve_of_one_class_is_drawn_once() -> None:
    recall, colour = np.linspace(0, 1, 101), np.array(class_colour(0))
    mean = {"bbox/all classes, IoU 0.50": 1 - recall}
    for others, drawn in (({"bbox/cell": 1 - recall}, False), ({"bbox/cell": recall, "bbox/disc": recall}, True)):
        picture = pr_curves({"recall": recall, "precision": mean | others}, "objects")
        assert (np.abs(picture.astype(int) - colour).max(-1) < 30).any() == drawn
