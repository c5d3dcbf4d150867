/* cuDNN without engines: every graph is refused, so that attention takes the project's own kernels. */
#include <cudnn.h>
#include <stdio.h>
#include <stdlib.h>

size_t cudnnGetVersion(void) { return 91400; }
const char *cudnnGetErrorString(cudnnStatus_t s) { return s == CUDNN_STATUS_SUCCESS ? "success" : "refused by the emulator"; }
void cudnnGetLastErrorString(char *text, size_t bytes) { snprintf(text, bytes, "the emulator has no engines"); }
cudnnStatus_t cudnnCreate(cudnnHandle_t *h)
{
    *h = malloc(1);
    return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnDestroy(cudnnHandle_t h)
{
    free(h);
    return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnSetStream(cudnnHandle_t h, cudaStream_t s)
{
    (void)h;
    (void)s;
    return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnBackendCreateDescriptor(cudnnBackendDescriptorType_t type, cudnnBackendDescriptor_t *d)
{
    (void)type;
    *d = NULL;
    return CUDNN_STATUS_NOT_SUPPORTED;
}
cudnnStatus_t cudnnBackendDestroyDescriptor(cudnnBackendDescriptor_t d)
{
    (void)d;
    return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnBackendFinalize(cudnnBackendDescriptor_t d)
{
    (void)d;
    return CUDNN_STATUS_NOT_SUPPORTED;
}
cudnnStatus_t cudnnBackendSetAttribute(cudnnBackendDescriptor_t d, cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, int64_t count,
                                       const void *values)
{
    (void)d;
    (void)name;
    (void)type;
    (void)count;
    (void)values;
    return CUDNN_STATUS_NOT_SUPPORTED;
}
cudnnStatus_t cudnnBackendGetAttribute(cudnnBackendDescriptor_t const d, cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type,
                                       int64_t asked, int64_t *count, void *values)
{
    (void)d;
    (void)name;
    (void)type;
    (void)asked;
    (void)count;
    (void)values;
    return CUDNN_STATUS_NOT_SUPPORTED;
}
cudnnStatus_t cudnnBackendExecute(cudnnHandle_t h, cudnnBackendDescriptor_t plan, cudnnBackendDescriptor_t pack)
{
    (void)h;
    (void)plan;
    (void)pack;
    return CUDNN_STATUS_NOT_SUPPORTED;
}
