"""Projects features to two dimensions."""

import numpy as np

from selfray.check import require


def project_2d(features: np.ndarray, seed: int = 0) -> np.ndarray:
    """Features float [n, D] -> float32 [n, 2]: t-SNE of L2-normalised features.

    It runs on one thread, so that a seed always gives the same map on a machine; meanwhile all
    OpenMP and BLAS work of the process is limited to one thread. 600 features take about 2 s of a
    core. Fewer than 10 features are projected on their principal components; collapsed features all
    lie at 0. Raises ValueError if features are empty or not finite.
    """
    require(
        features.ndim == 2 and features.size > 0,
        f"features must be [n, D] and not empty, got {list(features.shape)}",
    )
    require(bool(np.isfinite(features).all()), "features hold NaN or infinity: the run diverged")
    # Imported here because it takes a second.
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        unit = features.astype(np.float64)
        unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
        components = _principal_components(unit, 50)  # [n, <= 50]
        start = np.zeros((len(features), 2))
        start[:, : components.shape[1]] = components[:, :2]
        spread = start[:, 0].std()
        if len(features) < 10 or spread < 1e-6:
            return start.astype(np.float32)
        tsne = TSNE(
            perplexity=min(30.0, (len(features) - 1) / 3),
            init=start / spread * 1e-4,
            max_iter=500,
            random_state=seed,
            n_jobs=1,
        )
        return tsne.fit_transform(components).astype(np.float32)


def _principal_components(features: np.ndarray, most: int) -> np.ndarray:
    """The coordinates [n, min(n, D, most)] on the principal axes, each axis with a fixed sign."""
    left, scale, _ = np.linalg.svd(features - features.mean(axis=0), full_matrices=False)
    coordinates = (left * scale)[:, :most]
    extreme = np.abs(coordinates).argmax(axis=0)
    return coordinates * np.where(np.take_along_axis(coordinates, extreme[None], 0) < 0, -1, 1)
