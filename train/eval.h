/* Evaluation on held-out rows: how well a model predicts the text, and how close it is to its teacher. T = 1, over the valid ids of both.
 *
 * Used by distill eval for its table, and by training now and then. The maths of one position is kernels/<backend>/compare_logits; sums
 * are in double. Does not own the rows or the models. */
#ifndef TRAIN_EVAL_H
#define TRAIN_EVAL_H

#include "data/corpus.h"
#include "train/model.h"

/* The expected calibration error of Naeini et al. 2015 and Guo et al. 2017. Confidence is the largest probability; positions fall into bins of equal width by it,
 * (0, 1/15] to (14/15, 1], and the error is the mean, over positions, of their bin's |share of right first choices - mean confidence|. */
enum { CALIBRATION_BINS = 15 };
struct calibration { double confidence[CALIBRATION_BINS]; int64_t right[CALIBRATION_BINS], n; };   /* sums per bin; zeroed to begin with */
void calibration_add(struct calibration *c, double confidence, bool right);
double calibration_error(const struct calibration *c);

/* Means over the supervised positions, in nats. Without a teacher its members and everything that compares with it are 0. */
struct eval_result {
    int64_t rows, positions;
    double loss, top1, top5;                              /* -log q(label); share of positions whose label is the first, among the first five */
    double teacher_loss, teacher_top1, teacher_top5;
    double confidence, calibration_error, teacher_confidence, teacher_calibration_error;
    double forward_kl, reverse_kl, agreement;             /* KL(p||q), KL(q||p); share of positions where both put the same id first */
    double loss_error, forward_kl_error;                  /* standard errors, positions taken as independent draws */
    double teacher_loss_error;
};

/* Standard error of a share over n positions (binomial, positions taken as independent: in text they are not quite). */
double share_error(double share, int64_t n);

/* Evaluates `student` on the first max_rows (0: all) of `rows`, against `teacher` unless it is NULL. Both are ready, on one backend, with room
 * for the same positions per pass, at least one row; ids 0 .. Vv-1 take part. The parameters are not touched, the batch on the device is.
 * ERR_MISMATCH: a row holds an id >= Vv. ERR_NUMERIC: logits that are NaN or Inf. ERR_INPUT: no position is supervised. */
int eval_rows(struct model *student, struct model *teacher, const struct corpus_rows *rows, int64_t max_rows, int64_t Vv, struct eval_result *out);

#endif
