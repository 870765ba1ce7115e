"""One offline HTML file about a trained model, as a pure function of a JSON summary.

Anything shown can be recomputed from the summary, and the same summary gives the same bytes. A summary is what
``json.loads`` returns: an object with these entries, where any number may be ``null`` (shown as a dash) and a part
that does not apply is ``null`` or absent. ELBO terms are unweighted, nats per cell.

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
    A list of ``epoch, step, kl_weight, train_elbo, validation_elbo``, and what else training recorded.
``latent``
    ``method``, ``xy`` (a pair per cell shown), ``n_cells_shown``, ``n_cells``, and ``colours``: by column name,
    ``kind`` (``"categorical"`` or ``"continuous"``) and ``values`` (one per cell shown; ``null`` is a missing value).
``recovery``
    For simulated data, a list of ``name, value, reference, meaning``: how well the truth was found again.
"""
