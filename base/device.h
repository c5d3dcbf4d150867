/* Functions that a CPU and a GPU both have, from one definition: HOST_DEVICE before their type. */
#ifndef BASE_DEVICE_H
#define BASE_DEVICE_H

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__
#else
#define HOST_DEVICE
#endif

#endif
