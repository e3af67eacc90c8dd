import numpy as np
import pytest

from selfray.report.evaluation_charts import confusion_matrix, label_efficiency


@pytest.mark.parametrize("classes", [2, 12, 60])
def test_a_confusion_matrix_is_darkest_where_most_images_are(classes):
    counts = np.eye(classes, dtype=np.int64) * 10
    names = [f"class {c}" for c in range(classes)]
    right = np.asarray(confusion_matrix(counts, names, "digits"))
    wrong = np.asarray(confusion_matrix(np.roll(counts, 1, 1), names, "digits"))
    assert right.shape == wrong.shape
    assert (right != wrong).any()


def test_a_matrix_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"must be \[3, 3\] for 3 names"):
        confusion_matrix(np.eye(2), ["a", "b", "c"], "digits")


def test_a_curve_over_labels_has_a_line_for_each_encoder():
    points = [(10, 0.5, 0.4, 0.6), (100, 0.8, 0.75, 0.85)]
    one = label_efficiency({"a": points}, "digits")
    two = label_efficiency({"a": points, "b": points[::-1]}, "digits")
    assert two.height > one.height
    with pytest.raises(ValueError, match="nothing to draw"):
        label_efficiency({}, "digits")
