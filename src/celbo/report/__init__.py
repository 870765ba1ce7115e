"""Make one offline HTML file about a trained model from a JSON summary.

The page depends only on the summary: the same summary gives the same bytes. A summary is an object, as ``json.loads``
returns it, with the entries below. Any number may be ``null``, which the page shows as a dash. A part that does not
apply is ``null`` or absent. ELBO terms are unweighted, in nats per cell.

``title``, ``verdict``, ``celbo_version``, ``notes``
    Strings; the verdict is one sentence and comes first, ``notes`` is a list of warnings.
``metrics``
    ``n_cells, n_genes, likelihood, latent_dim, epochs, steps, seconds, cells_per_second, peak_memory_mb,
    elbo_train, elbo_validation, reconstruction_validation, kl_validation, kl_per_dim, active_units,
    kl_weight_final, ablation``.
``diagnosis``
    ``findings`` (each ``name, verdict, meaning, try_next``) and ``remedies`` (each ``command, why``).
``run``
    ``options``, ``versions`` and ``data`` (objects), ``seed``.
``history``
    A list of ``epoch, step, kl_weight, train_elbo, validation_elbo``, and other records of training.
``latent``
    ``method``, ``xy`` (a pair per cell shown), ``n_cells_shown``, ``n_cells``, and ``colours``: by column name,
    ``kind`` (``"categorical"`` or ``"continuous"``) and ``values`` (one per cell shown; ``null`` is a missing value).
``recovery``
    For simulated data, a list of ``name, value, reference, meaning``: how well the model recovers the truth.
"""
